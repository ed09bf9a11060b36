"""Upload the finished result to the Hub."""

from pathlib import Path

from finetuning.families.model_args import ModelError


def build_upload(run, tags=()):
    """What --push_to_hub asks for: the same call on every process."""
    return HubUpload(run, tags) if run.args.push_to_hub and run.is_main else NoUpload()


class HubUpload:
    """The repository that --push_to_hub uploads to, made before the first step: a wrong token fails at once.

    `tags` go into the model card.
    """

    def __init__(self, run, tags=()):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        self.run, self.tags, self.errors = run, tags, (HfHubHTTPError, OSError, ValueError)
        self.api = HfApi(token=run.args.hub_token)
        name = run.args.hub_model_id or run.output_dir.resolve().name
        try:
            self.repo = self.api.create_repo(name, exist_ok=True)
        except self.errors as error:
            message = f"--push_to_hub: no repository {name} to be had: {error}; log in with `hf auth login`"
            raise ModelError(message) from error

    def push(self):
        """Upload the finished result with a model card; checkpoints and logs stay here. Whether it went well."""
        args = self.run.args
        base = args.pretrained_model_name_or_path
        known_base = "" if Path(base).is_dir() else f"base_model: {base}\n"  # the Hub refuses what it does not know
        tags = f"tags: [{', '.join(self.tags)}]\n" if self.tags else ""
        (self.run.output_dir / "README.md").write_text(
            f"---\n{known_base}library_name: diffusers\npipeline_tag: text-to-image\n{tags}---\n\n"
            f"{base}, fine-tuned on {args.dataset_name or 'own images'}. "
            "All arguments stand in args.json.\n",
            encoding="utf-8",
        )
        stays = ["checkpoint-*", "abandoned-*", ".incomplete-*", "metrics.jsonl", "validation/*"]
        try:
            self.api.upload_folder(
                repo_id=self.repo.repo_id,
                folder_path=self.run.output_dir,
                commit_message="Fine-tuned Stable Diffusion",
                ignore_patterns=[*stays, f"{Path(args.logging_dir)}/*"],
            )
        except self.errors as error:
            self.run.say(
                f"the upload failed ({error}); the result is whole in {self.run.output_dir}: "
                f"`hf upload {self.repo.repo_id} {self.run.output_dir} --exclude 'checkpoint-*'` tries again"
            )
            return False
        self.run.say(f"uploaded: {self.repo}")
        return True


class NoUpload:
    """The same call without --push_to_hub, and on all processes but the main one."""

    def push(self):
        """Nothing to upload, so nothing went wrong."""
        return True
