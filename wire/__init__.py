"""What travels between processes: messages, codec, channels."""
