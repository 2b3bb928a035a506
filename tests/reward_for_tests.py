"""Reward functions that tests name by path."""


def vowels(completions, **_):
    """Share of vowels in each reply."""
    return [sum(c in "aeiou" for c in text) / (len(text) or 1) for text in completions]


def vader(completions, **_):
    """VADER compound sentiment of each reply."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in completions]


def constant(completions, **_):
    """The same of every reply."""
    return [1.0] * len(completions)


def brevity(completions, **_):
    """Few characters."""
    return [-float(len(text)) for text in completions]
