"""What is done with a trained model: predictions, features, exports."""
