"""Settings of where a run computes, and where its results go."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from mara_integrations.errors import ConfigError
from mara_integrations.models.options import Quantization, TrainingEngineName, keyword_arguments
from mara_integrations.sampling import Params
from mara_integrations.training.settings.identity_mark import OutsideIdentity

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class PlacementSettings(Params):
    """What runs the model, on which device, and where metrics and the head are sent."""

    track: Annotated[
        tuple[TrackerName, ...],
        Field(
            description="Where metrics go beside metrics.jsonl: tensorboard (into the output folder), wandb or "
            "trackio. May be repeated."
        ),
        OutsideIdentity(),
    ] = ()
    push_to_hub: Annotated[
        str | None,
        Field(
            description="Private repository of the Hugging Face Hub that the finished head is uploaded to: weights, "
            "config, card and reward models."
        ),
        OutsideIdentity(),
    ] = None
    public: Annotated[
        bool, Field(description="With --push-to-hub: everybody may read the repository."), OutsideIdentity()
    ] = False
    device: Annotated[
        str,
        Field(description="Device of the model, such as cpu or cuda:1; auto is CUDA, then MPS, then CPU."),
        OutsideIdentity(),
    ] = "auto"
    dtype: Annotated[
        str,
        Field(
            description="Number format of the weights while the head is trained; auto is bfloat16 on GPUs that have it "
            "and on processors with instructions for it (AVX512-BF16, AMX), float32 on others. The head runs on any."
        ),
    ] = "auto"
    quantization: Annotated[
        Quantization | None,
        Field(description="On the CPU, int8 runs linear layers faster and in a quarter of the memory."),
    ] = None
    model_kwargs: Annotated[
        dict[str, Any],
        Field(
            default_factory=dict,
            description="Argument of from_pretrained, such as device_map=auto, tp_plan=auto (under torchrun) or "
            "quantization_config={quant_method: bitsandbytes, load_in_4bit: true}; of llama.cpp n_ctx, n_gpu_layers or "
            "n_threads. May be repeated.",
        ),
    ]
    engine: Annotated[
        TrainingEngineName,
        Field(
            description="What runs the model while the head is trained: llama.cpp takes .gguf files in their own "
            "quantisation, and trains heads of the form q. auto is transformers, or llama.cpp for a .gguf file whose "
            "float32 copy memory can't hold."
        ),
    ] = "auto"
    ray: Annotated[
        int,
        Field(
            ge=0,
            le=1024,
            description="Processes on Ray that generate replies, with a model each; the reward runs in another. 0: "
            "everything runs in this process.",
        ),
        OutsideIdentity(),
    ] = 0

    @field_validator("model_kwargs", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        try:
            return keyword_arguments(value or {})
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _ray_with_engine(self) -> Self:
        if self.ray and self.model_kwargs.get("tp_plan") is not None:
            raise ValueError("a process on Ray holds a whole model: give either ray or tp_plan, not both")
        if self.ray and self.engine == "llama.cpp":
            raise ValueError("engine='llama.cpp' runs in this process alone: leave ray out, or use transformers")
        return self
