"""Messages, codecs and channels between processes."""
