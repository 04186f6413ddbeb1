"""`python -m train.recipes NAME`: see `small_models.py`."""

from conversion.commands import exit_on_error
from train.recipes.small_models import main


if __name__ == "__main__":
    with exit_on_error():
        main()
