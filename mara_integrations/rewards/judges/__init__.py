"""A language model as a reward: it scores replies by a rubric, or compares each with another reply to the same prompt.

Any chat model of LangChain can judge. Its answers are kept on disk by the question, so that none is paid for twice.
"""

from mara_integrations.rewards.judges.answers import Answers
from mara_integrations.rewards.judges.calls import CallBudget
from mara_integrations.rewards.judges.reward import JudgeReward, judges_of, llm_judge, trial_of
from mara_integrations.rewards.judges.rubric import DEFAULT_RUBRIC
from mara_integrations.rewards.judges.session import JudgeSession

__all__ = [
    "DEFAULT_RUBRIC",
    "Answers",
    "CallBudget",
    "JudgeReward",
    "JudgeSession",
    "judges_of",
    "llm_judge",
    "trial_of",
]
