"""What is done with a saved model: evaluated, asked for predictions, exported."""
