"""Commands that turn other people's weights into checkpoint folders of this library; run with `python -m conversion.<name>`."""
