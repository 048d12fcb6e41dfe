"""What a run takes before it runs: FLOPs, bytes, memory and time.

lengths   tokens, labels and systems of edits
costs     FLOPs and bytes of every stage, by hand
programs  memory and FLOPs of a compiled program, without its arrays
machine   rates of this machine, measured
stages    the stages of a run with all of these
fit       what a device must hold, and what would fit
"""
