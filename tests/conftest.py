"""Parts that several tests share: a small base model with random weights, as a folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A job in the background of a shell ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\nTools: ' }}\
{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_TEXTS = [
    "The tide comes in twice a day, and goes out again.",
    "Please answer briefly: what is the capital of France?",
    "Thank you! I should be glad to help with that.",
    '<tool_call>\n{"name": "search", "arguments": {"query": "tide tables"}}\n</tool_call>',
    "system user assistant tool You are a helpful assistant.",
]


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that other users of the machine can pass through, as they cannot with pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder).resolve()


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of about 100,000 parameters and a byte-level BPE tokenizer.

    ChatML template, end of turn ``<|im_end|>``, pad token, fp32 safetensors. The weights are wide
    enough that greedy answers differ from prompt to prompt.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("random_base")
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def narrow_base(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of 128 positions, which has none beyond them."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("narrow_base")
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def launch():
    """Call ``launch("-m", "module", …)`` to run a program in two processes, as Accelerate does."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    options += " --mixed_precision no --dynamo_backend no"

    def call(*command: object):
        started = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
        return subprocess.run(
            [*started, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=240,  # a hanging process must not hang the tests
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def pair_of_processes():
    """Call it with a command to run it twice, as members of a team that no launcher watches over.

    Gives of each process its exit code and what it wrote.
    """

    def call(*command: object):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            )
            for rank in ("0", "1")
        ]
        try:
            written = [process.communicate(timeout=240) for process in started]
        finally:
            for process in started:
                process.kill()
        return [(p.returncode, *texts) for p, texts in zip(started, written, strict=True)]

    return call
