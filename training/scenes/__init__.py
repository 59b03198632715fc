"""Rendered rooms and places that resemble real ones: the second generator of training scenes."""
