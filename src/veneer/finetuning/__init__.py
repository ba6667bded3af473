"""``veneer.train``: supervised fine-tuning of an adapter on a file of examples, by TRL's trainer."""
