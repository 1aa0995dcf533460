"""The page's standing sentences: what scores mean, headings by mode, how to read."""

from __future__ import annotations

SCORE_TEXTS = {
    "js_divergence": "1 − Jensen-Shannon divergence (base 2) of the model's and the group's answer "
    "shares, mean over questions; from 0 to 1, higher is better.",
    "js_distance": "1 − Jensen-Shannon distance (root, natural log), mean over questions; from "
    "0.167 to 1, higher is better.",
    "js_distance_base2": "1 − Jensen-Shannon distance (root, base 2), mean over questions; from 0 "
    "to 1, higher is better.",
    "wasserstein": "1 − Wasserstein distance over the ordered options, as a share of the largest; "
    "mean over questions, from 0 to 1, higher is better.",
    "cosine": "cosine of the model's and the group's answer shares, mean over questions; from 0 to "
    "1, higher is better.",
    "pair_accuracy": "share of the group's votes that agree with the response the model prefers; "
    "from 0 to 1, higher is better.",
    "borda": "agreement of Borda points between the printed order and the group's (1 same order, "
    "0.5 chance, 0 reversed), mean over questions; higher is better.",
    "kendall": "(1 + Kendall's tau) / 2 of the printed order and the group's (1 same order, 0.5 "
    "chance, 0 reversed), mean over questions; higher is better.",
    "binary": "1 where the option printed first is a most chosen one of the group, else 0, mean "
    "over questions; higher is better.",
}
SAMPLED = " Of sampled texts; one that is no answer scores 0."
WORDS = {
    "weights": "Weights over rounds",
    "weights_text": "How much each group counted in the aggregate. A broken line is a group that "
    "was absent.",
    "validation": "Validation score over rounds",
    "validation_text": "Score of the adapter a group received, before it trained on it. The weight "
    "rule and early stop see this and nothing else. The thick line is the mean over the groups "
    "seen in a round.",
}
REWARD_WORDS = {
    "weights": "Influence over exchanges",
    "weights_text": "The share of each group in the gradient of the combined reward: how much it "
    "counted. A broken line is a group that gave no reward.",
    "validation": "Mean reward of sampled texts over exchanges",
    "validation_text": "What the texts of an exchange were worth to each group, on training "
    "questions, before the exchange's updates. The weight rule and early stop see this and nothing "
    "else. The thick line is the mean over the groups that answered.",
}
READING = (
    "A group's score says how close the answers of the one shared model are to what that group "
    "answers. Groups that disagree cannot all reach 1: the shared answer that is best for the "
    "average shows how far one model could go on average. A single group may stand above it.",
    "The worst group is a minimum of noisy numbers, so it is biased down, and the gap is biased "
    "up. Look at the interval, and never compare the worst group of few questions with that of "
    "many.",
    "The fairness index and the Jain index ignore quality: a model that serves everybody equally "
    "badly gets 1. Read them beside the average, the worst group and the uniform answerer.",
    "Option mass is the probability that the model answers with one of the options at all. Below "
    "the threshold of the run the scores mean nothing, and the run counts as failed.",
    "The personal adapter took extra local steps that never left the client. Local only is an "
    "adapter trained on the client's own data alone: with as many steps as the personal phase, "
    "and with as many as the client took in the whole run.",
    "Intervals come from resampling questions. They do not cover another seed, another split or "
    "another draw of clients; compare several seeds before you claim a difference.",
    "Scores and sizes are what clients report about themselves.",
)


REWARD_READING = (
    *READING[:3],
    "Option mass, or format rate, is how often the model answers with one of the options at all. "
    "Below the threshold of the run the scores mean nothing, and the run counts as failed.",
    "A reward is what a group gives to one sampled text; a score says how close the model's "
    "answers are to the group's on test questions. They have different units, and the policy is "
    "trained on the first only.",
    "A policy that stays nearer to the base looks calmer and more even across groups for that "
    "reason alone. Compare rules at the same KL.",
    "Intervals come from resampling questions. They do not cover another seed, another split or "
    "another draw of texts; compare several seeds before you claim a difference.",
    "Rewards and scores are what clients report about themselves.",
)
