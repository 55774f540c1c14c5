"""What the paper's figures 2, 3 and 5 need, computed from what a run of LoDA kept."""

from training.analyse.losses import losses
from training.analyse.run import PARTS, analyse
from training.analyse.subspaces import subspaces

__all__ = ["PARTS", "analyse", "losses", "subspaces"]
