"""One step, recorded on a GPU as a CUDA graph and replayed.

    run = RecordedStep(step, on_gpu=True)
    ran = run(moved=False)               # the first call records, later calls replay

A step of decoding launches a thousand small kernels. Launching them one by one takes longer than
running them, and a graph launches them all at once. A recorded step reads and writes the same
memory every time. So the step may change tensors in place only, and it is recorded again when one
of them has moved. On a CPU the step simply runs.
"""
import torch


class RecordedStep:
    """step: a function without arguments that changes tensors in place."""

    def __init__(self, step, on_gpu):
        self.step = step
        self.on_gpu = on_gpu
        self.graph = None

    def __call__(self, moved):
        """Run the step. `moved`: whether one of its tensors lies elsewhere than at the last call.

        Returns whether the step's Python code ran; a replay runs only its kernels.
        """
        if not self.on_gpu:
            self.step()
            return True
        record = moved or self.graph is None
        if record:
            self.graph = torch.cuda.CUDAGraph()
            # Another thread may copy the next batch meanwhile: record only this thread's work.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.step()
        self.graph.replay()
        return record
