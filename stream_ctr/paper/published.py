"""Numbers and claims that the DeepFM paper reports.

H. Guo, R. Tang, Y. Ye, Z. Li and X. He, "DeepFM: A Factorization-Machine based Neural Network for
CTR Prediction", IJCAI 2017, pages 1725-1731.

Only Table 2 of the paper has numbers. Figures 6 to 11 are pictures with sentences about them; this
module keeps the sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SOURCE = (
    "Huifeng Guo, Ruiming Tang, Yunming Ye, Zhenguo Li and Xiuqiang He: DeepFM: A "
    "Factorization-Machine based Neural Network for CTR Prediction. IJCAI 2017, pages 1725-1731."
)


class Scores(NamedTuple):
    """AUC and logloss of one system in Table 2."""

    auc: float
    logloss: float


# Table 2 (section 3.2), by the paper's names of the systems.
CRITEO: Mapping[str, Scores] = {
    "LR": Scores(0.7686, 0.47762),
    "FM": Scores(0.7892, 0.46077),
    "FNN": Scores(0.7963, 0.45738),
    "IPNN": Scores(0.7972, 0.45323),
    "OPNN": Scores(0.7982, 0.45256),
    "PNN*": Scores(0.7987, 0.45214),
    "LR & DNN": Scores(0.7981, 0.46772),
    "FM & DNN": Scores(0.7850, 0.45382),
    "DeepFM": Scores(0.8007, 0.45083),
}
COMPANY: Mapping[str, Scores] = {
    "LR": Scores(0.8640, 0.02648),
    "FM": Scores(0.8678, 0.02633),
    "FNN": Scores(0.8683, 0.02629),
    "IPNN": Scores(0.8664, 0.02637),
    "OPNN": Scores(0.8658, 0.02641),
    "PNN*": Scores(0.8672, 0.02636),
    "LR & DNN": Scores(0.8673, 0.02634),
    "FM & DNN": Scores(0.8661, 0.02640),
    "DeepFM": Scores(0.8715, 0.02618),
}
TABLE2: Mapping[str, Mapping[str, Scores]] = {"criteo": CRITEO, "company": COMPANY}

NAMES: Mapping[str, str] = {"criteo": "Criteo", "company": "Company*"}

# The two data sets (section 3.1).
DATA: Mapping[str, str] = {
    "criteo": "Criteo, 45 million rows, of which a random 90 % are the training part",
    "company": "Company*, about a billion rows of an app store's game centre, "
    "seven days for training and the next day for testing",
}


class Properties(NamedTuple):
    """A row of Table 1.

    The paper's columns "No Pre-training" and "No Feature Engineering" are stored without the "No".
    """

    pretraining: bool
    high_order: bool
    low_order: bool
    engineering: bool


# Table 1 (section 2.2). Its row PNN stands for IPNN, OPNN and PNN*. Its row Wide & Deep is the
# system that Table 2 calls LR & DNN.
TABLE1: Mapping[str, Properties] = {
    "FNN": Properties(pretraining=True, high_order=True, low_order=False, engineering=False),
    "IPNN": Properties(pretraining=False, high_order=True, low_order=False, engineering=False),
    "OPNN": Properties(pretraining=False, high_order=True, low_order=False, engineering=False),
    "PNN*": Properties(pretraining=False, high_order=True, low_order=False, engineering=False),
    "LR & DNN": Properties(pretraining=False, high_order=True, low_order=True, engineering=True),
    "DeepFM": Properties(pretraining=False, high_order=True, low_order=True, engineering=False),
}

# Section 3.1, "Parameter Settings", for Criteo. The paper does not give those for Company*:
# "carefully parameter study" chose them.
DROPOUT = 0.5
HIDDEN = (400, 400, 400)
K = 10
ACTIVATION = "relu"
ACTIVATION_IPNN = "tanh"

# The values on the axes of the figures in section 3.3.
VALUES: Mapping[str, Sequence[str]] = {
    "figure7": ("relu", "tanh"),
    "figure8": ("1.0", "0.9", "0.8", "0.7", "0.6", "0.5"),
    "figure9": ("100", "200", "400", "800"),
    "figure10": ("1", "3", "5", "7"),
    "figure11": ("constant", "increasing", "diamond", "decreasing"),
}

# Section 3.2 for Figure 6, section 3.3 for the others. Figures 7 to 11 are measured on Company*.
CLAIMS: Mapping[str, str] = {
    "figure6": "FNN's pre-training makes it less efficient; IPNN and PNN* are computationally "
    "expensive, on CPU and GPU; DeepFM is almost the most efficient in both tests.",
    "figure7": "relu is more appropriate than tanh for all the deep models, except for IPNN.",
    "figure8": "every model reaches its own best performance at a dropout (share of neurons kept) "
    "from 0.6 to 0.9.",
    "figure9": "more neurons do not always help: DeepFM performs stably from 400 to 800, OPNN gets "
    "worse; 200 or 400 neurons per layer are a good choice.",
    "figure10": "more hidden layers improve the performance at first; if their number keeps "
    "increasing, overfitting degrades it.",
    "figure11": "the constant network shape is empirically better than the other three.",
}


def counterpart(data: Mapping[str, Any]) -> str | None:
    """Return the key of the paper's data set that a log corresponds to, or None.

    `data` is `data` of report.json. A log in Criteo's format corresponds to Criteo, a simulated log
    to Company*.

    >>> counterpart({"format": "criteo", "simulated": None})
    'criteo'
    >>> counterpart({"format": "avazu", "simulated": None}) is None
    True
    """
    if data["format"] == "criteo":
        return "criteo"
    return None if data["simulated"] is None else "company"
