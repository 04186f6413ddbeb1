"""What `python -m train.recipes.serial_recipes` is made of.

plan.py                          commands, the folders that they write, data, and how a command is varied
qwen.py, clip.py, deeplatent.py  backbones, and what is trained on them
arms.py                          all arms by name, and the models that come of them
rates.py                         the learning rate of an arm, chosen on validation questions
scoring.py                       the commands that ask trained models
table.py                         from results to the table, in Markdown and JSON
"""
