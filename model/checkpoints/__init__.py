"""Files of Hugging Face's form: JSON settings, safetensors, adapters of PEFT."""
