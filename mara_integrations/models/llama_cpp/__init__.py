"""llama.cpp as a library: its C functions, and `.gguf` files loaded by it in their own quantisation.

Knows no heads, gates or decoding.
"""
