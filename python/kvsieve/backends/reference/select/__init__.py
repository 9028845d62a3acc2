"""Selection rules of the reference, one a file: the definition that the other backends are tested against."""
