"""Scripts that try to break the package, one kind of fault each. Their results are committed."""
