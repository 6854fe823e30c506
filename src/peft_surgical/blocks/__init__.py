"""The ordered blocks of any network, and the target language that names them.

``anatomy_of(network)`` finds the blocks; ``parse(text)`` gives a plan of what to tune, ``resolve(plan, anatomy)`` its
tensors in one network. The grammar of targets stands in `peft_surgical.blocks.parsing`.
"""

from .anatomy import Anatomy, Block, resolve
from .parsing import DATA_TARGETS, Name, parse, paths_matched
from .sources import anatomy_of

__all__ = ["DATA_TARGETS", "Anatomy", "Block", "Name", "anatomy_of", "parse", "paths_matched", "resolve"]
