"""Do pretrained features transfer? Corpora, tasks, and a comparison of recipes at equal compute."""
