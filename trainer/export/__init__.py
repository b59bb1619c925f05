"""Writes what others load, a Hugging Face directory or a PEFT adapter, whole or not at all."""
