"""What is learned from and asked: questions with reasoning, chats with pictures, procedural tasks, decontamination."""

from train import moved_attribute


def __getattr__(name: str):
    return moved_attribute(__name__, name)
