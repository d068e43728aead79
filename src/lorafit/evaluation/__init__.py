"""How good a model is: held-out loss in lorafit, and the same file as llama.cpp runs it."""
