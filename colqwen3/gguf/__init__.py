"""ColQwen3 as GGUF files for stock llama.cpp: text.gguf, mmproj.gguf and a program that runs them."""
