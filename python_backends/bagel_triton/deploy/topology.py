"""The three presets in which BAGEL is served: which Triton models run, and in how many processes.

They are presets, not a registry to extend: the pipeline knows the order of the stages by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

EXPANDER: Final = "cfg_expand"
THINKER: Final = "thinker"
DIT: Final = "dit"
DECODER: Final = "vae_decode"
ORCHESTRATOR: Final = "bagel"
UNARY: Final = "bagel_infer"
ENSEMBLE: Final = "bagel_text2img"


@dataclass(frozen=True)
class Topology:
    """``stages`` are the Triton models of each stage, by the stage id of a deploy YAML.

    With two stages, stage 0 is the thinker and stage 1 the DiT; with one, every engine lives in the orchestrator's
    process. ``think_by_default`` is for requests that do not say whether to think.
    """

    name: str
    stages: tuple[tuple[str, ...], ...]
    think_by_default: bool = False

    @property
    def one_process(self) -> bool:
        """Whether keys and values never leave the process."""
        return len(self.stages) == 1

    @property
    def models(self) -> tuple[str, ...]:
        """Triton models to load for all stages on one server."""
        chains = () if self.one_process else (ORCHESTRATOR, UNARY, ENSEMBLE)
        return tuple(model for stage in self.stages for model in stage) + chains

    def models_of(self, stage_id: int) -> tuple[str, ...]:
        """Triton models of a server that has one of two stages: the first one's also follows requests.

        An ensemble's models must be in its own Triton, so none has that.
        """
        return (*self.stages[stage_id], *((ORCHESTRATOR, UNARY) if stage_id == 0 else ()))


_TWO_STAGES = ((EXPANDER, THINKER), (DIT, DECODER))
BAGEL = Topology("bagel", _TWO_STAGES)
BAGEL_THINK = Topology("bagel_think", _TWO_STAGES, think_by_default=True)
BAGEL_SINGLE_STAGE = Topology("bagel_single_stage", ((ORCHESTRATOR,),))
TOPOLOGIES = {topology.name: topology for topology in (BAGEL, BAGEL_THINK, BAGEL_SINGLE_STAGE)}
MODELS = BAGEL.models
