"""Fields of other servers' APIs that have no effect here.

``IGNORED`` fields cannot change this model's answer, so any value is accepted. ``NOOP`` fields
could change it: a value that requests nothing is accepted, any other is refused by name, with
what to do instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Noop(NamedTuple):
    """The values of a field that request nothing, as an empty text always does, and the advice for all others."""

    values: tuple[Any, ...]
    instead: str = "leave it out"

    def permits(self, value: Any) -> bool:
        """Whether ``value`` requests nothing; ``True`` is not 1 here."""
        return value == "" or any(
            value == noop and isinstance(value, bool) == isinstance(noop, bool) for noop in self.values
        )


IGNORED: dict[str, frozenset[str]] = {
    "body": frozenset(
        {
            # OpenAI: identity, accounting, latency and storage
            *("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
            *("service_tier", "store", "metadata", "parallel_tool_calls", "tool_choice", "prediction", "verbosity"),
            # routing of gateways and agents
            *("provider", "models", "route", "session_id", "chat_id", "trace", "request_id", "rid", "cache_salt"),
            *("litellm_metadata", "client_metadata", "litellm_session_id", "litellm_trace_id", "litellm_call_id", "id"),
            *("tags", "fallbacks", "debug", "speed", "cache_control", "user_id", "end_user_id", "safety_tolerance"),
            # how much of the thinking a reply has: all of it
            "reasoning_summary",
            # how another server would hold its model, cache its prompt or make its noise
            *("keep_alive", "cache_prompt", "id_slot", "generator_device", "vae_use_slicing", "vae_use_tiling"),
            *("timings_per_token", "return_progress", "rollout_sde_type", "ttl", "draft_model"),
            # what to do with a conversation that does not fit: it is refused
            *("transforms", "context_length_exceeded_behavior"),
            # of tools and documents, which a request cannot have; and images are always seen in full
            *("disable_tool_validation", "citation_options", "vl_high_resolution_images"),
            # every reply has its metrics
            "return_stage_metrics",
            # parameters of samplers that the fields of NOOP switch off
            *("mirostat_tau", "mirostat_eta", "dynatemp_exponent", "smoothing_curve", "xtc_threshold"),
            *("dry_base", "dry_allowed_length", "dry_sequence_breakers", "dry_penalty_last_n", "repeat_last_n"),
        }
    ),
    "message": frozenset(
        {
            # earlier thinking is no part of a conversation, however a client names it
            *("reasoning_content", "reasoning", "reasoning_details", "thinking_blocks", "reasoning_items"),
            *("name", "id", "annotations", "provider_specific_fields", "cache_control", "prompt_cache_breakpoint"),
            *("prefix", "partial", "seed", "index", "tool_call_id", "model", "metadata", "created_at", "timestamp"),
            "createdAt",
            # what an earlier reply said about itself
            *("status", "finish_reason", "stop_reason", "usage", "usage_metadata", "response_metadata"),
            *("citations", "sources", "extra_content"),
            # what an editor notes for itself
            *("opts", "cycle", "_meta"),
        }
    ),
    "part": frozenset({"cache_control", "prompt_cache_breakpoint", "annotations", "id", "uuid", "index", "seed"}),
    "thought_part": frozenset(
        {
            *("thinking", "reasoning", "text", "summary", "content", "data", "signature", "encrypted_content"),
            *("format", "closed", "cache_control", "id", "index"),
        }
    ),
    "image_url": frozenset({"detail", "format", "media_type", "mime_type", "id", "name", "filename"}),
    # usage is counted once, at the end
    "stream_options": frozenset({"include_obfuscation", "continuous_usage_stats"}),
    # earlier thinking is no part of a conversation
    "template_options": frozenset({"clear_thinking", "preserve_thinking"}),
    "thinking": frozenset({"clear_thinking", "keep"}),
}
_IN_PARTS = "put images into content, as parts of type image_url"
_TEXT_ONLY = "ask for it in the prompt, and read the answer's text"
_NO_TOOLS = "this model calls no tools: leave them out, and send their results as text"
_NO_SEARCH = "this model cannot search: put what it should know into the prompt"
_BESIDE = "put its members beside the other fields"
# A chat request may have its fields in these; no other may.
_WRAPPERS = dict.fromkeys(("extra_body", "extra_args", "extra_params"), Noop(({},), _BESIDE))
_SIZE = "use size, or height and width"
_ONE_SOLVER = "there is one solver: num_inference_steps and timestep_shift set its steps"
_NO_SAMPLER = "temperature, top_p, top_k, min_p and the penalties are the sampling there is"
_STILL = "images are still and made of pixels: leave it out, or take png, jpeg or webp as output_format"
NOOP: dict[str, dict[str, Noop]] = {
    "body": {
        "tools": Noop(([],), _NO_TOOLS),
        "functions": Noop(([],), _NO_TOOLS),
        "function_call": Noop(("none", "auto"), _NO_TOOLS),
        "response_format": Noop(({"type": "text"}, {}), _TEXT_ONLY),
        "structured_outputs": Noop(({}, False), _TEXT_ONLY),
        "guided_json": Noop((), _TEXT_ONLY),
        "guided_regex": Noop((), _TEXT_ONLY),
        "guided_choice": Noop((), _TEXT_ONLY),
        "guided_grammar": Noop((), _TEXT_ONLY),
        "grammar": Noop((), _TEXT_ONLY),
        "json_schema": Noop(({},), _TEXT_ONLY),
        "logits_processors": Noop(([],), _NO_SAMPLER),
        "audio": Noop((), "this model makes no sound: leave it out"),
        "web_search_options": Noop((), _NO_SEARCH),
        "plugins": Noop(([],), "put what the model should know into the prompt"),
        "documents": Noop(([],), "put what the model should know into the prompt"),
        "best_of": Noop((1,), "use n, and choose from the results"),
        "num_beams": Noop((1,), _NO_SAMPLER),
        "use_beam_search": Noop((False,), _NO_SAMPLER),
        "early_stopping": Noop((False,), "use stop or max_tokens"),
        "length_penalty": Noop((1, 0), _NO_SAMPLER),
        "min_length": Noop((0,), "use min_tokens"),
        "ban_eos_token": Noop((False,), "use ignore_eos"),
        "stop_token_ids": Noop(([],), "use stop, with their texts"),
        "bad_words": Noop(([],), "use logit_bias, with their tokens"),
        "allowed_token_ids": Noop(([],), "use logit_bias"),
        "include_stop_str_in_output": Noop((False,), "add the stop text to the answer yourself"),
        "skip_special_tokens": Noop((True,)),
        "spaces_between_special_tokens": Noop((True, False)),
        "return_token_ids": Noop((False,), "use top_logprobs"),
        "return_tokens_as_token_ids": Noop((False,), "use top_logprobs"),
        "prompt_logprobs": Noop((), "log-probabilities are those of the answer: use top_logprobs"),
        "truncate_prompt_tokens": Noop((-1,), "shorten the conversation yourself"),
        "chat_template": Noop((), "write the template's output as the prompt"),
        "add_special_tokens": Noop((True, False)),
        "echo": Noop((False,), "add the prompt to the answer yourself"),
        "mm_processor_kwargs": Noop(({},), "resize the images yourself"),
        "media_io_kwargs": Noop(({},)),
        "kv_transfer_params": Noop(({},)),
        "repeat_penalty": Noop((1,), "use repetition_penalty"),
        "repetition_penalty_range": Noop((0, -1), "repetition_penalty counts all of the text"),
        "encoder_repetition_penalty": Noop((1,), _NO_SAMPLER),
        "n_predict": Noop((-1,), "use max_tokens"),
        "n_keep": Noop((0,), "shorten the conversation yourself"),
        "n_probs": Noop((0,), "use logprobs and top_logprobs"),
        "options": Noop(({},), "put its members beside messages, in this API's names"),
        "nvext": Noop(({},), _BESIDE),
        "vllm_xargs": Noop(({},), _BESIDE),
        "raw": Noop((False,), "write the template's output as the prompt"),
        "detokenize": Noop((True,), "use top_logprobs"),
        "deferred": Noop((False,), "this server keeps no replies: use stream=true for a long request"),
        # other servers' names of what this API has
        "system_prompt": Noop((), "use a message of role system"),
        "system": Noop((), "use a message of role system"),
        "use_system_prompt": Noop((False,), "use a message of role system"),
        "input": Noop((), "use messages; POST /v1/responses takes input"),
        "output_modalities": Noop((), "use modalities"),
        "sampling_params_list": Noop(([],), _BESIDE),
        "sampling_params": Noop(({},), _BESIDE),
        "guidance": Noop((), "use guidance_scale"),
        "guidance_scale_2": Noop((), "use true_cfg_scale for guidance by the image"),
        "context_length": Noop((), "the server's own length is used"),
        "num_ctx": Noop((), "the server's own length is used"),
        "random_seed": Noop((), "use seed"),
        "max_new_tokens": Noop((), "use max_tokens"),
        "max_output_tokens": Noop((), "use max_tokens"),
        "stop_sequences": Noop(([],), "use stop"),
        "resolution": Noop(("auto",), _SIZE),
        "batch_size": Noop((1,), "use n"),
        "strength": Noop((), "say in the prompt how much to change"),
        "sampler_name": Noop((), _ONE_SOLVER),
        "scheduler": Noop((), _ONE_SOLVER),
        "max_sequence_length": Noop((), "a prompt is never cut"),
        "format": Noop((), _TEXT_ONLY),
        "regex": Noop((), _TEXT_ONLY),
        "ebnf": Noop((), _TEXT_ONLY),
        "reasoning_format": Noop(("auto", "parsed", "deepseek"), "thinking is in reasoning_content"),
        "separate_reasoning": Noop((True,), "thinking is in reasoning_content"),
        "stream_reasoning": Noop((True,), "thinking streams as it comes; include_reasoning=false leaves it out"),
        "no_stop_trim": Noop((False,), "add the stop text to the answer yourself"),
        "stop_regex": Noop(([],), "use stop"),
        "banned_tokens": Noop(([],), "use logit_bias"),
        "banned_strings": Noop(([],), "use logit_bias, with their tokens"),
        "return_hidden_states": Noop((False,)),
        "lora_path": Noop((), "name an adapter of the server in lora, or as model"),
        "enable_teacache": Noop((False,), "use cache='taylorseer'"),
        "rollout": Noop((False,)),
        "diffusers_kwargs": Noop(({},), "use the fields of this API"),
        "samplers": Noop(([],), "their order is fixed"),
        "sampler_priority": Noop(([],), "their order is fixed"),
        "temperature_last": Noop((False,), "the order of the samplers is fixed"),
        "dynamic_temperature": Noop((False,), _NO_SAMPLER),
        "top_n_sigma": Noop((0, -1), _NO_SAMPLER),
        "nsigma": Noop((0,), _NO_SAMPLER),
        "skew": Noop((0,), _NO_SAMPLER),
        "typ_p": Noop((1, 0), _NO_SAMPLER),
        "typical_p": Noop((1, 0), _NO_SAMPLER),
        "typical": Noop((1, 0), _NO_SAMPLER),
        "tfs": Noop((1,), _NO_SAMPLER),
        "tfs_z": Noop((1,), _NO_SAMPLER),
        "top_a": Noop((0,), _NO_SAMPLER),
        "epsilon_cutoff": Noop((0,), _NO_SAMPLER),
        "eta_cutoff": Noop((0,), _NO_SAMPLER),
        "min_keep": Noop((0,), _NO_SAMPLER),
        "mirostat": Noop((0,), _NO_SAMPLER),
        "mirostat_mode": Noop((0,), _NO_SAMPLER),
        "dynatemp_range": Noop((0,), _NO_SAMPLER),
        "smoothing_factor": Noop((0,), _NO_SAMPLER),
        "xtc_probability": Noop((0,), _NO_SAMPLER),
        "dry_multiplier": Noop((0,), _NO_SAMPLER),
        "no_repeat_ngram_size": Noop((0,), "use the penalties"),
        "penalty_alpha": Noop((0,), _NO_SAMPLER),
        "num_images": Noop((1,), "use n"),
        "num_return_sequences": Noop((1,), "use n"),
        "quality": Noop(("auto", "low", "medium", "high", "standard", "hd"), "use num_inference_steps"),
        "style": Noop(("vivid", "natural"), "describe the style in the prompt"),
        "moderation": Noop(("auto", "low"), "this server moderates nothing"),
        "background": Noop(("auto", "opaque"), "images are opaque"),
        "num_frames": Noop((1,), _STILL),
        "fps": Noop((), _STILL),
        "layers": Noop((), "an image has one layer"),
        "output_format": Noop(("png",), "POST /v1/images/generations makes jpeg and webp"),
        # switches of other vendors' services
        "safe_prompt": Noop((False,), "write it into a system message"),
        "safety_settings": Noop(([],), "this server moderates nothing"),
        "enable_search": Noop((False,), _NO_SEARCH),
        "search_parameters": Noop(({}, {"mode": "off"}), _NO_SEARCH),
        "return_images": Noop((False,), _NO_SEARCH),
        "return_related_questions": Noop((False,)),
        "incremental_output": Noop((True,), "a stream has what is new"),
        "result_format": Noop(("message",)),
        "tool_stream": Noop((False,), _NO_TOOLS),
    },
    "message": {
        "refusal": Noop((), "put it into content"),
        "audio": Noop((), "put its transcript into content"),
        "function_call": Noop(({},), _NO_TOOLS),
        "tool_calls": Noop(([],), _NO_TOOLS),
        "toolInvocations": Noop(([],), _NO_TOOLS),
        "invalid_tool_calls": Noop(([],), _NO_TOOLS),
        "type": Noop(("message",)),
        "parts": Noop(([],), "put them into content"),
        "additional_kwargs": Noop(({},), "put its members beside content"),
        "files": Noop(([],), _IN_PARTS),
        "attachments": Noop(([],), _IN_PARTS),
        "experimental_attachments": Noop(([],), _IN_PARTS),
    },
    "part": {},
    "image_url": {},
    "stream_options": {},
    "template_options": {},
    "thinking": {
        "display": Noop(("summarized",), "thinking is in reasoning_content; include_reasoning=false hides it")
    },
}
# The images endpoints: what has no effect in a chat has none there.
IGNORED["images"] = IGNORED["body"] | {"stream_options", "enable_safety_checker", "disable_safety_checker"}
NOOP["images"] = (
    NOOP["body"]
    | _WRAPPERS
    | {
        "svg": Noop((), _STILL),
        "frame_count": Noop((1,), _STILL),
        "frame_duration_ms": Noop((), _STILL),
        "image": Noop(([],), "POST /v1/images/edits takes images"),
        "images": Noop(([],), "POST /v1/images/edits takes images"),
        "image_url": Noop((), "POST /v1/images/edits takes images, in image"),
        "input_image": Noop((), "POST /v1/images/edits takes images, in image"),
        "reference_images": Noop(([],), "POST /v1/images/edits takes images, in image"),
        "sampler": Noop((), _ONE_SOLVER),
        "sampler_index": Noop((), _ONE_SOLVER),
        "n_iter": Noop((1,), "use n"),
        "denoising_strength": Noop((), "say in the prompt how much to change"),
        "restore_faces": Noop((False,), "describe the faces in the prompt"),
        "tiling": Noop((False,)),
        "enable_hr": Noop((False,), _SIZE),
        "megapixels": Noop((), _SIZE),
        "sync_mode": Noop((True, False)),
        "output_quality": Noop(("default",), "use output_compression"),
        "response_extension": Noop(("png",), "use output_format"),
        "image_loras": Noop(([],), "the server merges one adapter into its weights: serve --lora-path"),
        "sequential_image_generation": Noop(("disabled",), "use n"),
        "watermark": Noop((False,), "images carry no watermark"),
        "prompt_extend": Noop((False,), "think=true plans the image first"),
        "prompt_enhancement": Noop((False,), "think=true plans the image first"),
        "optimize_prompt": Noop((False,), "think=true plans the image first"),
        "complexity": Noop((), "think=true plans the image first; num_inference_steps sets the effort of drawing it"),
    }
)
# The Responses API: likewise, and what it alone has.
IGNORED |= {
    "responses": IGNORED["body"] - {"tool_choice"} | {"max_tool_calls"},
    "input_part": IGNORED["part"] | {"logprobs"},
    "input_message": frozenset(("id", "status", "phase", "name")),
    "input_image": frozenset(("detail", "prompt_cache_breakpoint")),
    "input_reasoning": frozenset(("id", "summary", "content", "encrypted_content", "status")),
    "input_image_call": frozenset(
        ("id", "status", "action", "background", "quality", "revised_prompt", "size", "seed", "error")
    ),
    "image_tool": frozenset(("model", "moderation", "input_fidelity")),
    "text": frozenset(("verbosity",)),
}
NOOP |= {
    "responses": {name: noop for name, noop in NOOP["body"].items() if name != "background"}  # of the work there
    | _WRAPPERS
    | {
        "truncation": Noop(("disabled", "auto"), "input that does not fit is refused"),
        "context_management": Noop(([],), "shorten the input yourself"),
        "moderation": Noop((), "this server moderates nothing"),
    },
    "image_tool": {name: NOOP["images"][name] for name in ("svg", "frame_count", "frame_duration_ms", "complexity")},
}
