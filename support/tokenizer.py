"""LLaMA's tokenizer: text → ids and back, with SentencePiece.

    tokenizer = Tokenizer("llava-v1.5-7b/tokenizer.model")
    ids = tokenizer.encode("Is there a dog in the image?")
"""
import os

from sentencepiece import SentencePieceProcessor

from support.common import InputError

PAD, BOS, EOS = 0, 1, 2


class Tokenizer:
    """LLaMA's SentencePiece model. Text that looks like a control token is encoded as text."""

    def __init__(self, path):
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; copy LLaMA's tokenizer.model there")
        self.path = path
        try:
            self.model = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path}: not a SentencePiece model ({str(e).splitlines()[0]}); "
                             "copy tokenizer.model again") from e
        ids = self.model.unk_id(), self.model.bos_id(), self.model.eos_id()
        if ids != (PAD, BOS, EOS):
            raise InputError(f"{path}: unk, bos, eos are {ids} and must be {(PAD, BOS, EOS)}; "
                             "this is not LLaMA's tokenizer")

    def __reduce__(self):
        return Tokenizer, (self.path,)              # a pickle holds the path and no more

    def __len__(self):
        return self.model.vocab_size()

    def encode(self, text, continues=False):
        """Ids of a text. Where it `continues` behind a control token, it has no space mark."""
        ids = self.model.encode(text)
        if continues and ids:
            bare = self.model.id_to_piece(ids[0]).removeprefix("\u2581")
            ids[:1] = [self.model.piece_to_id(bare)] if bare else []
        return ids

    def decode(self, ids):
        # Hugging Face's LLaVA has more embeddings than pieces; such an id is no text.
        known = [int(i) for i in ids if i not in (PAD, BOS, EOS) and i < len(self)]
        return self.model.decode(known)
