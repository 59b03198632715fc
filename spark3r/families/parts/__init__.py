"""Parts that several families share: recognition, projection, rotary embedding, memory savers."""
