"""How the engines load an export: the commands of its README.md."""

from pathlib import Path

from trimtab.exporting.engines import VLLM


def host_name(ref: str) -> str:
    """What stands for the host in a command: its name, unless only Trimtab could read that.

    Args:
        ref: What the user called it.
    """
    return "HOST" if ref.endswith(".gguf") or ref.startswith("tiny:") else ref


def peft_usage(
    ref: str, rank: int, *, is_encoder_decoder: bool, peft_alone: bool, in_vllm: bool
) -> str:
    """Commands for peft, vLLM and SGLang.

    Args:
        ref: The host.
        rank: Rank with its padding.
        is_encoder_decoder: The host is one.
        peft_alone: No other engine loads it.
        in_vllm: vLLM takes a LoRA on this host's head.
    """
    host = host_name(ref)
    parts = [_placeholders(host), "With peft:", _peft(host, is_encoder_decoder)]
    if in_vllm and not peft_alone:
        parts += [
            "With vLLM, beside other LoRAs, chosen for each request by its name (`trimtab` for the"
            "\nmodel). Let `--max-loras` be one more than the LoRAs that are served: the CPU build"
            f"\nof {VLLM} gives requests without a LoRA the one in the last place.",
            f"```sh\nvllm serve {host} --enable-lora --max-lora-rank {rank} --max-loras 2 \\\n"
            "  --lora-modules trimtab=FOLDER\n```",
        ]
    if not peft_alone:
        parts += [
            "With SGLang (0.5.23 has this; not tried):",
            f"```sh\npython -m sglang.launch_server --model-path {host} --enable-lora \\\n"
            f"  --max-lora-rank {rank} --lora-target-modules lm_head --lora-paths trimtab=FOLDER\n"
            "```",
        ]
    return "\n\n".join(parts)


def _placeholders(host: str) -> str:
    said = "FOLDER is this folder"
    if host == "HOST":
        said += ", HOST the same model in transformers' form (a hub name or a folder)"
    return f"{said}."


def _peft(host: str, is_encoder_decoder: bool) -> str:
    auto = "AutoModelForSeq2SeqLM" if is_encoder_decoder else "AutoModelForCausalLM"
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'host = {auto}.from_pretrained("{host}")\n'
        'model = PeftModel.from_pretrained(host, "FOLDER")\n```'
    )


def merged_usage(*, in_vllm: bool, in_llamacpp: bool) -> str:
    """Commands for a checkpoint with the head folded in.

    Args:
        in_vllm: vLLM reads its head.
        in_llamacpp: llama.cpp's converter does.
    """
    found = (
        "FOLDER is this folder: an ordinary checkpoint.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
    )
    if in_vllm:
        found += "\n\nvLLM, and every engine like it that serves the host: `vllm serve FOLDER`."
    if in_llamacpp:
        found += "\n\nFor llama.cpp convert it with its own `convert_hf_to_gguf.py FOLDER`."
    return found


def gguf_usage(ref: str, adapter: str, host_file: str | None) -> str:
    """Commands for llama.cpp.

    Args:
        ref: The host.
        adapter: Name of the adapter's file.
        host_file: Name of the host's untied copy in the folder; None where the host's own file
            serves.
    """
    host = f"FOLDER/{host_file}" if host_file else (ref if ref.endswith(".gguf") else "HOST.gguf")
    said = "FOLDER is this folder."
    if host == "HOST.gguf":
        said = "FOLDER is this folder, HOST.gguf the host converted for llama.cpp."
    elif host_file:
        said += f" Use {host_file} in it, not {Path(ref).name}, which has no head of its own."
    return (
        f"{said}\n\n```sh\nllama-server -m {host} --lora FOLDER/{adapter}\n"
        f"llama-cli -m {host} --lora-scaled FOLDER/{adapter}:0.5    # half of the strength\n```\n\n"
        'A request to llama-server may set its own strength: `"lora": [{"id": 0, "scale": 0.5}]`.'
    )


def onnx_usage(
    file: str, strength: float, prior: float, share: float, *, is_encoder_decoder: bool
) -> str:
    """How to run the graph, and how to keep the evidence that `trimtab generate` keeps.

    Args:
        file: Name of the graph's file.
        strength: Its default strength.
        prior: Trust in the head before any evidence.
        share: Part of the trust that is dealt out anew at each token.
        is_encoder_decoder: The host is one.
    """
    whose = "its decoder's" if is_encoder_decoder else "its"
    return (
        f"Run the host with {whose} last hidden state (`last_hidden_state` in transformers, before"
        " anything\nscales it for the head) and its logits as outputs, and this graph after it,"
        " once a token:\n\n"
        "```python\nimport numpy as np\nimport onnxruntime\n\n"
        f'graph = onnxruntime.InferenceSession("FOLDER/{file}")\n'
        "steered, logprobs = graph.run(\n"
        '    ["steered_logits", "logprobs"],\n'
        '    {"hidden": hidden, "logits": logits, "trust": np.ones(len(logits), np.float32)},\n'
        ")\n```\n\n"
        "All arrays are float32: `hidden` [n, hidden], `logits` and both results [n, vocab]."
        f" `strength` is a further input, {strength:g} unless given. `logprobs` is the mixture of"
        " bare host and steered host, `trust` [n] the share of the latter: 1 follows the head.\n\n"
        f"`trimtab generate` begins with trust {prior:g} and learns it from the text. After each"
        " token that has been read, with its probability `p` under the steered and `q` under the"
        f" bare host:\n\n"
        "```python\ntrust = trust * p / (trust * p + (1 - trust) * q)\n"
        f"trust = {1 - share:g} * trust + {share * prior:g}\n```"
    )
