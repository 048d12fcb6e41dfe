"""Whether a prompt asks for a stored fact, and how that is learnt (SERAC).

classifier   an encoder and a threshold; its loss on a batch
answers      the counterfactual model, and training by its answers alone
examples     records as texts, their hard negatives, batches
training     settings and the job that a run of training drives
"""
