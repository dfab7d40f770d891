"""Third-party models and files made into this library's objects."""
