"""Speculative decoding: guesses of the next tokens, and the measured cost that decides how many are fed ahead.

It affects the speed alone. Which guesses are kept is the decoder's decision, and the tokens are the same without them.
"""
