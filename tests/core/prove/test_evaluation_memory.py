"""An evaluation takes hardly more memory than the training before it, at any vocabulary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

VOCABULARY = 151_936  # Qwen's; 32 probes of 64 tokens make 1.2 GB of logits in float32

EVALUATION = """
import resource, sys
from agentpref.config import UpdateConfig
from agentpref.learn.learner import Learner
from agentpref.models.base import load_base
from agentpref.prove import evaluate
from tests.core.prove.conftest import make_pair

def peak():
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1e6 if sys.platform == "darwin" else 1e3)

config = UpdateConfig(precision="float32", epochs=1, batch_size=8, learning_rate=1e-6)
learner = Learner(load_base(sys.argv[1], precision="float32"), None, config)
rows = learner.encode([make_pair(n, f"yes, {n} it is") for n in range(48)])
trained, held_out = rows[:16], rows[16:]
learner.fit(trained, new=16)
before = peak()
kl = evaluate.kl_from_base(learner, held_out, seed=0)
scores = evaluate.score(learner, held_out)
nothing = evaluate.score(learner, [])
found = evaluate.gather(
    learner, scores, nothing, kl=kl, trained=trained, checks={}, config=config
)
assert found.candidate.finite and found.candidate.mean_length == 64, found
print(peak() - before)
"""


@pytest.fixture
def wide_base(random_base: Path, tmp_path: Path) -> Path:
    """A folder with a random Llama of one layer, which never ends an answer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(random_base).save_pretrained(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_an_evaluation_at_a_vocabulary_of_150000_adds_less_than_200_mb_to_training(
    wide_base: Path,
) -> None:
    command = [sys.executable, "-c", EVALUATION, str(wide_base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 200
