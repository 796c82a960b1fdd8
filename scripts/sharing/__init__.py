"""DPO that runs each prompt once: TRL's trainer with another forward.

TRL scores a batch of pairs as twice as many rows, `[prompt | chosen]` and `[prompt | rejected]`,
padded to the longest. Here the same batch goes through the model as one row without padding,

    [prompt | chosen | last prompt token, rejected | the next pair ...]

in which `rejected` attends to the prompt and to itself, at the positions it has in a row of its own
(prefix sharing, https://arxiv.org/abs/2410.20305; the last prompt token stands there twice, so that
each token has one successor to predict). The head sees answer tokens only. What comes out has the
shape that TRL's own forward gives, so losses, metrics, callbacks, saving and resuming are TRL's.

| file | holds |
| --- | --- |
| `row.py` | a batch of pairs as one row, and back |
| `attention.py` | who may attend to whom in that row |
| `head.py` | log-probabilities of the answer tokens, without the full logits |
| `lora.py` | the adapter's update added inside its own product |
| `forward.py` | the model's forward made of these, switched on and off |
| `support.py` | which models can share, and the proof before training that this one does |
| `reference_cache.py` | reference log-probabilities kept on disk |
| `trainer.py` | TRL's trainer over all of it |

Tensors are named with their dimensions as a suffix, `hidden_ND` for (N, D):

    B  pairs of the batch           L  tokens of TRL's padded rows    T  tokens of the shared row
    N  answer tokens to be scored   D  width of the model             V  words of the vocabulary
    H  query heads                  K  key and value heads            E  size of a head
    Q  queries of one attention     S  its keys
"""
