"""How a trained model is judged while modalities go missing: hcmen-eval."""
