"""Files in Hugging Face's formats: JSON settings, safetensors, PEFT adapters."""
