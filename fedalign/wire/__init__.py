"""What travels: the name, shape, type and range of every array and metric, in both directions.

This is the whole list of what leaves a client:

==========  ====================================================================================
reply to    content (k = clients named in the message, P = entries of the trained factors)
==========  ====================================================================================
hello       client names, groups, question counts, size claims; model manifest; library versions
score       per client and split: mean score, questions, option mass, score of a uniform answerer;
            on test, when ``score.items`` is on: question keys (hashes) and their scores
train       LoRA factors, float32 (k, P), or in fewer bytes their change against those received
            (``coarse.py``); validation score of the *received* adapter and its question count,
            option mass, uniform score; loss (mean, first, last), pairs, steps, tokens, seconds
personal    per client and stage: test score, question count, option mass; question scores as above
exchange    per client: one reward and one code for each sampled text (``exchange.py``)
predictor   per client: parameters of the preference predictor, float32 (k, P); losses, option
            tokens, validation error and its question count (``predictor.py``)
==========  ====================================================================================

and a status code for each client.  Nothing else: no text of a question or answer, no exception
message, no path.  A site may withhold its scores: then the reply holds zeros in their place and
counts no question.  A site whose policy refuses answers with a status alone, to ``hello`` as to any
other message.  Every message names its clients and carries protocol version, phase, round,
attempt and the run's configuration.

Decoding is strict.  A broken record condemns the message (``WireError``); a broken row (non-finite
entries, score out of range) condemns that client alone.
"""

from __future__ import annotations

from fedalign.wire.coarse import (
    BFLOAT16,
    FLOAT32,
    INT8,
    PRECISIONS,
    Coarse,
)
from fedalign.wire.exchange import (
    CODES,
    EXCHANGE,
    FROM_SHARES,
    MALFORMED,
    PREDICTED,
    REFUSED,
    UNANSWERED,
    Question,
    RewardReply,
    Rollouts,
    decode_rewards,
    decode_rollouts,
    encode_rewards,
    encode_rollouts,
)
from fedalign.wire.records import (
    BAD_REQUEST,
    BUDGET_EXHAUSTED,
    F32,
    HELLO,
    INTERNAL_ERROR,
    MANIFEST_MISMATCH,
    MAX_CLIENTS,
    MAX_ITEMS,
    NO_DATA,
    NON_FINITE,
    OK,
    OUT_OF_RANGE,
    PERSONAL,
    POLICY_CODES,
    PROTOCOL,
    REFUSED_AGGREGATION,
    REFUSED_BASE_MODEL,
    REFUSED_OBJECTIVE,
    REFUSED_SETTINGS,
    SCORE,
    STATUS,
    TOO_FEW_EXAMPLES,
    TRAIN,
    UNKNOWN_CLIENT,
    Hello,
    Manifest,
    Request,
    Score,
    ScoreReply,
    TrainReply,
)
from fedalign.wire.replies import (
    decode_scores,
    decode_train,
    encode_failure,
    encode_scores,
    encode_train,
)
from fedalign.wire.requests import (
    adapter_record,
    broadcast_record,
    decode_adapter,
    decode_broadcast,
    decode_hello,
    decode_request,
    encode_hello,
    encode_request,
)

__all__ = [
    "BAD_REQUEST",
    "BFLOAT16",
    "BUDGET_EXHAUSTED",
    "CODES",
    "EXCHANGE",
    "F32",
    "FLOAT32",
    "FROM_SHARES",
    "HELLO",
    "INT8",
    "INTERNAL_ERROR",
    "MALFORMED",
    "MANIFEST_MISMATCH",
    "MAX_CLIENTS",
    "MAX_ITEMS",
    "NON_FINITE",
    "NO_DATA",
    "OK",
    "OUT_OF_RANGE",
    "PERSONAL",
    "POLICY_CODES",
    "PRECISIONS",
    "PREDICTED",
    "PROTOCOL",
    "REFUSED",
    "REFUSED_AGGREGATION",
    "REFUSED_BASE_MODEL",
    "REFUSED_OBJECTIVE",
    "REFUSED_SETTINGS",
    "SCORE",
    "STATUS",
    "TOO_FEW_EXAMPLES",
    "TRAIN",
    "UNANSWERED",
    "UNKNOWN_CLIENT",
    "Coarse",
    "Hello",
    "Manifest",
    "Question",
    "Request",
    "RewardReply",
    "Rollouts",
    "Score",
    "ScoreReply",
    "TrainReply",
    "adapter_record",
    "broadcast_record",
    "decode_adapter",
    "decode_broadcast",
    "decode_hello",
    "decode_request",
    "decode_rewards",
    "decode_rollouts",
    "decode_scores",
    "decode_train",
    "encode_failure",
    "encode_hello",
    "encode_request",
    "encode_rewards",
    "encode_rollouts",
    "encode_scores",
    "encode_train",
]
