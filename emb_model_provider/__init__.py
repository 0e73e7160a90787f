"""An OpenAI-compatible embedding service for models from ModelScope, Hugging Face or a directory."""
