"""Reward functions that tests name by path."""


def vowels(completions, **_):
    """Share of vowels in each reply."""
    return [sum(c in "aeiou" for c in text) / (len(text) or 1) for text in completions]


def vader(completions, **_):
    """VADER compound sentiment of each reply."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in completions]
