"""llama.cpp as a host's engine: a GGUF file stays quantised (`pip install 'trimtab[llamacpp]'`)."""
