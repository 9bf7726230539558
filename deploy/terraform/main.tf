# What production needs of AWS besides a Kubernetes cluster: the bucket of backups and artifacts, an account that may
# write to it, and the names of the secrets that External Secrets reads. Values of secrets are put in by hand.

terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }
}

variable "region" {
  description = "Region of the bucket and of the secrets."
  type        = string
  default     = "eu-central-1"
}

variable "bucket" {
  description = "Name of the bucket; names of buckets are unique in the world."
  type        = string
  default     = "overtone-backups"
}

provider "aws" {
  region = var.region
}

resource "aws_s3_bucket" "backups" {
  bucket = var.bucket
}

resource "aws_s3_bucket_versioning" "backups" {
  bucket = aws_s3_bucket.backups.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "backups" {
  bucket = aws_s3_bucket.backups.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "aws:kms"
    }
  }
}

resource "aws_s3_bucket_public_access_block" "backups" {
  bucket                  = aws_s3_bucket.backups.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_iam_user" "backups" {
  name = "overtone-backups"
}

resource "aws_iam_user_policy" "backups" {
  name = "write-backups"
  user = aws_iam_user.backups.name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect   = "Allow"
      Action   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"]
      Resource = [aws_s3_bucket.backups.arn, "${aws_s3_bucket.backups.arn}/*"]
    }]
  })
}

resource "aws_secretsmanager_secret" "overtone" {
  for_each = toset(["api", "redis", "x", "object-store", "mlflow"])
  name     = "overtone/${each.key}"
}

output "bucket" {
  description = "For destinationPath of the ObjectStore overtone-backups."
  value       = aws_s3_bucket.backups.bucket
}
