"""What a model's attention layers saw on prompts: recorded in vLLM, kept on disk, laid out anew."""
