"""The topologies BAGEL can be served in: declarative, and all there is to edit to add one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Execution = Literal["autoregressive", "diffusion"]
KVSent = Literal["prefill_finished", "decoding_finished"]
EXPANDER: Final = "cfg_expand"
THINKER: Final = "thinker"
DIT: Final = "dit"
DECODER: Final = "vae_decode"
ORCHESTRATOR: Final = "bagel"
UNARY: Final = "bagel_infer"
ENSEMBLE: Final = "bagel_text2img"


@dataclass(frozen=True)
class StageSpec:
    """One stage of a topology, as a deploy YAML numbers it.

    ``models`` are the Triton models that run it; ``input_stages`` the stages it hears
    from. ``expands_prompts`` names the stage that turns a request into branches, and
    ``sends_kv`` says when a stage lends its contexts; None for one that lends none.
    """

    stage_id: int
    name: str
    execution: Execution
    models: tuple[str, ...]
    input_stages: tuple[int, ...] = ()
    expands_prompts: bool = False
    sends_kv: KVSent | None = None


@dataclass(frozen=True)
class Topology:
    """Stages, and the models that chain them.

    With ``one_process`` every engine lives in the orchestrator and KV never leaves it.
    """

    name: str
    stages: tuple[StageSpec, ...]
    chains: tuple[str, ...]
    one_process: bool = False

    def __post_init__(self) -> None:
        ids = [stage.stage_id for stage in self.stages]
        if ids != list(range(len(ids))):
            raise ValueError(f"topology {self.name}: stage ids {ids} are not 0, 1, ...")
        for stage in self.stages:
            if any(source >= stage.stage_id for source in stage.input_stages):
                raise ValueError(f"topology {self.name}: stage {stage.stage_id} hears from {stage.input_stages}")

    @property
    def models(self) -> tuple[str, ...]:
        """Triton models to load, each once."""
        return tuple(dict.fromkeys([model for stage in self.stages for model in stage.models] + list(self.chains)))

    def models_of(self, stage_id: int) -> tuple[str, ...]:
        """Triton models of a server that has one stage: the first one's also follows requests.

        An ensemble's models must be in its own Triton, so none has that.
        """
        return (*self.stages[stage_id].models, *((ORCHESTRATOR, UNARY) if stage_id == 0 else ()))

    @property
    def think_by_default(self) -> bool:
        """What a request means that does not say whether to think: contexts that are sent
        only after decoding have something to be decoded first."""
        return any(stage.sends_kv == "decoding_finished" for stage in self.stages)

    @property
    def expander(self) -> StageSpec:
        """The stage that expands prompts."""
        return next(stage for stage in self.stages if stage.expands_prompts)


def _two_stages(name: str, sends_kv: KVSent) -> Topology:
    thinker = StageSpec(0, "thinker", "autoregressive", (EXPANDER, THINKER), (), True, sends_kv)
    dit = StageSpec(1, "dit", "diffusion", (DIT, DECODER), (0,))
    return Topology(name, (thinker, dit), (ORCHESTRATOR, UNARY, ENSEMBLE))


BAGEL = _two_stages("bagel", "prefill_finished")
BAGEL_THINK = _two_stages("bagel_think", "decoding_finished")
BAGEL_SINGLE_STAGE = Topology(
    "bagel_single_stage",
    (StageSpec(0, "dit", "diffusion", (ORCHESTRATOR,), expands_prompts=True),),
    chains=(),
    one_process=True,
)
TOPOLOGIES = {topology.name: topology for topology in (BAGEL, BAGEL_THINK, BAGEL_SINGLE_STAGE)}
MODELS = tuple(dict.fromkeys(model for topology in TOPOLOGIES.values() for model in topology.models))
