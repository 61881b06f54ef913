"""Text in, text out: prompts and chats to tokens, through the engine and back."""
