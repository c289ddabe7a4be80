//! Who may report, who may watch, and who may control.

use std::fmt::Debug;

use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
        authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
        core::v1::Pod,
    },
};
use kube::{Api, Client, Resource, ResourceExt as _, api::PostParams};
use meander_crds::{CdcPipeline, ReplayJob};
use serde::de::DeserializeOwned;
use tonic::{Status, metadata::MetadataMap};

use super::{Kind, ResourceKey};
use crate::naming::{AUDIENCE, PIPELINE_LABEL, REPLAY_LABEL, capture_name, replay_name};

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Checks tokens with the API server.
#[derive(Clone)]
pub struct Authenticator {
    client: Client,
}

impl Authenticator {
    /// An authenticator.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// Lets a pod report on the resource that it was made for, and on no other.
    ///
    /// # Errors
    /// UNAUTHENTICATED without a good token, PERMISSION_DENIED with somebody else's.
    pub async fn reporter(&self, metadata: &MetadataMap, key: &ResourceKey, uid: &str) -> Result<(), Status> {
        let user = self.user(metadata).await?;
        let refused = || Status::permission_denied("the token is not that of a pod of the resource");
        let claim = |name: &str| user.extra.as_ref()?.get(name)?.first().cloned();
        let (Some(pod_name), Some(pod_uid)) = (claim(POD_NAME), claim(POD_UID)) else {
            return Err(refused());
        };
        let (label, account) = match key.kind {
            Kind::CdcPipeline => (PIPELINE_LABEL, capture_name(&key.name)),
            Kind::ReplayJob => (REPLAY_LABEL, replay_name(&key.name)),
        };
        if user.username != Some(format!("system:serviceaccount:{}:{account}", key.namespace)) {
            return Err(refused());
        }
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let pod = pods
            .get_opt(&pod_name)
            .await
            .map_err(unavailable)?
            .ok_or_else(refused)?;
        if pod.uid().as_deref() != Some(&pod_uid) || pod.labels().get(label) != Some(&key.name) {
            return Err(refused());
        }
        let current = match key.kind {
            Kind::CdcPipeline => self.uid::<CdcPipeline>(key).await?,
            Kind::ReplayJob => self.uid::<ReplayJob>(key).await?,
        };
        if current.as_deref() == Some(uid) {
            Ok(())
        } else {
            Err(refused())
        }
    }

    /// Lets those watch or control a resource who may `get` or `patch` it in Kubernetes. Returns who it is.
    ///
    /// # Errors
    /// UNAUTHENTICATED without a good token, PERMISSION_DENIED without the right.
    pub async fn permitted(
        &self,
        metadata: &MetadataMap,
        verb: &'static str,
        key: &ResourceKey,
    ) -> Result<String, Status> {
        let user = self.user(metadata).await?;
        let name = user.username.clone().unwrap_or_default();
        let plural = match key.kind {
            Kind::CdcPipeline => "cdcpipelines",
            Kind::ReplayJob => "replayjobs",
        };
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: user.username,
                groups: user.groups,
                uid: user.uid,
                extra: user.extra,
                resource_attributes: Some(ResourceAttributes {
                    group: Some("meander.dev".to_owned()),
                    resource: Some(plural.to_owned()),
                    verb: Some(verb.to_owned()),
                    namespace: Some(key.namespace.clone()),
                    name: Some(key.name.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let reviews: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = reviews
            .create(&PostParams::default(), &review)
            .await
            .map_err(unavailable)?;
        if answer.status.is_some_and(|status| status.allowed) {
            Ok(name)
        } else {
            Err(Status::permission_denied(format!(
                "{name} may not {verb} {plural} {}/{}",
                key.namespace, key.name
            )))
        }
    }

    async fn user(&self, metadata: &MetadataMap) -> Result<UserInfo, Status> {
        let header = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let token = header
            .strip_prefix("Bearer ")
            .map(str::trim)
            .filter(|token| !token.is_empty());
        let Some(token) = token else {
            return Err(Status::unauthenticated(format!(
                "send `authorization: Bearer <token>` with a service account's token for the audience {AUDIENCE}"
            )));
        };
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![AUDIENCE.to_owned()]),
            },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let status = reviews
            .create(&PostParams::default(), &review)
            .await
            .map_err(unavailable)?
            .status
            .unwrap_or_default();
        // A server that does not know audiences would leave them out and accept any token.
        let for_us = status.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
        match status.user {
            Some(user) if status.authenticated == Some(true) && for_us => Ok(user),
            _ => Err(Status::unauthenticated(format!(
                "the token is not valid for the audience {AUDIENCE}"
            ))),
        }
    }

    async fn uid<K>(&self, key: &ResourceKey) -> Result<Option<String>, Status>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &key.namespace);
        Ok(api
            .get_opt(&key.name)
            .await
            .map_err(unavailable)?
            .and_then(|resource| resource.uid()))
    }
}

fn unavailable(error: kube::Error) -> Status {
    tracing::warn!(%error, "cannot check a caller");
    Status::unavailable("the API server did not answer; try again")
}
