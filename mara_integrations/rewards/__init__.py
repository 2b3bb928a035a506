"""Scores replies by a function, a reward model, an LLM that judges, a rule that finds offending text, or their sum.

A reward is called once a batch, and its result is checked, so that a mistake in it becomes one clear message. Nothing
here knows of training.
"""

from mara_integrations.rewards.classifier import ModelReward
from mara_integrations.rewards.combined import CombinedReward
from mara_integrations.rewards.fingerprint import reward_fingerprint
from mara_integrations.rewards.functions import FunctionReward, load_reward
from mara_integrations.rewards.judges import JudgeReward, judges_of, llm_judge, trial_of
from mara_integrations.rewards.protocol import DescribedRule, Reward, Rule, reward_name, takes_partial_text
from mara_integrations.rewards.rules import Required, parse_rule
from mara_integrations.rewards.scoring import Scores, score
from mara_integrations.rewards.specs import (
    RewardLike,
    combine_rewards,
    load_rewards,
    parse_reward,
    reward_from_spec,
    reward_spec,
    weighted_rewards,
)
from mara_integrations.rewards.words import ForbiddenWords

__all__ = [
    "CombinedReward",
    "DescribedRule",
    "ForbiddenWords",
    "FunctionReward",
    "JudgeReward",
    "ModelReward",
    "Required",
    "Reward",
    "RewardLike",
    "Rule",
    "Scores",
    "combine_rewards",
    "judges_of",
    "llm_judge",
    "load_reward",
    "load_rewards",
    "parse_reward",
    "parse_rule",
    "reward_fingerprint",
    "reward_from_spec",
    "reward_name",
    "reward_spec",
    "score",
    "takes_partial_text",
    "trial_of",
    "weighted_rewards",
]
