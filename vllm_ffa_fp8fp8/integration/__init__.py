"""What touches vLLM beyond its interface for backends: patches, versions, refusals."""
