"""What surrounds the loop of train.py: flags, DeepSpeed, samplers, guards, resume, kept
features.
"""
