"""The whole of params.yaml, checked before any stage touches a result."""
