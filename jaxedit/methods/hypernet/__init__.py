"""Editors that are trained: a network turns the gradient of an edit into a delta.

  factors    inputs and output gradients of the edited maps, at every token
  network    what a hyper-network is; how a trained one is kept in a file
  training   its loss and one training step
  editor     the editor that a trained network makes

Methods: `methods/mend.py`, `methods/ke.py`. The loop of training, which reads
data and keeps checkpoints, is `runs/training.py`.
"""
